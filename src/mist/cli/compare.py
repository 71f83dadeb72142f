"""stub"""
import click
@click.command()
def compare() -> None:
    """stub"""
