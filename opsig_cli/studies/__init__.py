"""What each command does between the file and its records: a file a study. Change here what a command finds out."""
