"""Other training libraries, each in a module that imports it; see docs/integrations.md."""
