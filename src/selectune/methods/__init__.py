"""The methods: each turns gradients, losses or tokens into what is worth training."""
