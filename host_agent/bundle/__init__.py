"""`vmctl bundle`: a frozen wrapper and a job as a version of a BOINC application."""
