"""How records become bytes (`codec`), and how they get from rank to rank (`between_ranks`)."""
