"""Remotes of datasets: the download over http(s), and the local cache with a limit of its size."""
