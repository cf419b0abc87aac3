"""File -> example -> text -> tokens and loss mask -> batch."""
