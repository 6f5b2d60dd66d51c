"""The HTTP service: one file an API family over one Service, which is over one Backend."""
