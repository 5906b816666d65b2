"""What lies on disk and how it is read: manifest, audio, traces, teacher store, stream."""
