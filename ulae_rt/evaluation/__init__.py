"""How good a registration is: overlap, surfaces, landmarks, regularity, and the tables of it."""
