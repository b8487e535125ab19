"""The ground that every part stands on: errors for users, files, command lines."""
