"""Text to ids and back: `tokenizer` opens every kind of file alike, `training` makes new ones."""
