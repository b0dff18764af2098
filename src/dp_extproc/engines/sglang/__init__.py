"""SGLang engines: the adapter, the table of releases, and the readers of pages."""
