"""The `headway` command: parser, help, and verbs that belong to no other package. Imports all packages of launcher."""
