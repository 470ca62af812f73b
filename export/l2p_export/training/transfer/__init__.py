"""Transfer of a source to pixel space: settings, memory forecast, batches, training, and the adapter file."""
