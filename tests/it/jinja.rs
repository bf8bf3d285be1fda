//! Chat templates against jinja2's own answers, and where their characters come from.
