"""The routes of the REST API, one file per resource. Start at `jobs`; `common` has what they share."""
