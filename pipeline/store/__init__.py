"""Where steps keep their files, and what they hand on."""
