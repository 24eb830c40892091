"""The example project, as it is served: over HTTP, and in a browser."""
