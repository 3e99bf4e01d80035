"""The command line: parsing, printing, exit codes; one file per command."""
