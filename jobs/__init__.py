"""Entry points over `pipeline`: one typer app (`cli`) of `commands`. Only here are environment variables read."""
