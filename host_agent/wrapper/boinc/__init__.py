"""The application side of the BOINC client's protocol."""
