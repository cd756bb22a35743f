"""The `headway` command: parser, help, verbs that belong to no other room. Imports every room."""
