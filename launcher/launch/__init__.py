"""`headway train`: checks a spec, then starts its processes and sees them through. Imports plan and below."""
