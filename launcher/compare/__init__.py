"""Analysis of a study: paired differences, intervals, fairness, findings. Imports launch and below."""
