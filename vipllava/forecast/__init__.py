"""What a job will need and take, from sizes alone: parameters, memory, work, hours."""
