"""What comes from other tools and goes to them: scores by id, and chosen rows in their forms."""
