"""What every room may use: errors, console output, new folders, verb registration. Imports no other room."""
