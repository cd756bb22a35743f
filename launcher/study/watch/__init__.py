"""`headway study watch`: a page of a running study that renews itself."""
