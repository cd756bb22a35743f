"""A ladder of sizes: variances, trends of differences over size, and joint scaling laws, with intervals."""
