"""One file per attention mechanism; `headway.model.attention.registry` lists them."""
