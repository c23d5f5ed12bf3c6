"""BOINC's side: the wrapper's loop, job.xml and the tasks."""
