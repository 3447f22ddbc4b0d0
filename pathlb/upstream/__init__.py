"""How bytes reach one endpoint."""
