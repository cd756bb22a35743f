"""What is measured of a model beside its loss: heads, attention, routers, branches. Imports model and kernels."""
