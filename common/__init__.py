"""Parts that all other packages use: errors for users, files and locks, command lines, CPU cores."""
