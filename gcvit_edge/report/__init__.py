"""Reports for people: tables on the terminal, the bundle's model card."""
