"""The segment as files: names, settings, header, creation, opening, removal."""
