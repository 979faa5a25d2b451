"""What runs between Dynamo's capture and Inductor."""
