"""What a hostile file, option, model or disk does to the commands; `make hostile` runs every case."""
