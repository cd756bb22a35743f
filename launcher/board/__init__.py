"""What shows records elsewhere: TensorBoard (event files, server), W&B and MLflow. Imports run and below."""
