"""Pages that people read: one HTML file each, made of a template and charts; nothing fetched, nothing run."""
