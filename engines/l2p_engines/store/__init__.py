"""Files on disk: content-named stages, shared stores, bundle output, locks."""
