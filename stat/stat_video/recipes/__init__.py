"""Recipe files, found by bare name: `--config clips_tiny`."""
