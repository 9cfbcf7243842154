"""The command line: options, jobs, exit codes."""
