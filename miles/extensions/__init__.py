"""Functions of users: loading them, and what they get and return. docs/extensions.md lists where they are called."""
