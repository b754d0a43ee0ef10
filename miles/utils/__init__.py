"""Names that functions of users import, as they do with the systems that `docs/extensions.md` names."""
