"""`headway train`: checks a spec, then starts and supervises its processes. Imports plan and below."""
