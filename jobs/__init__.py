"""Entry points over `pipeline`: one typer app (`cli`), one file a command. Only here are environment variables read."""
