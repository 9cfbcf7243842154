"""From YAML files and words to a `RunConfig`."""
