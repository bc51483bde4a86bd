"""The stages: one file each, named in `data_pipelines.registry.STAGES`."""
