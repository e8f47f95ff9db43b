"""The ground floor: model, routing, expert parallelism, numerics and stability techniques, with torch alone."""
