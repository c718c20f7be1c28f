"""`manage.py seed`: fills the shop with the same rows every time, from a fixed seed and a fixed calendar."""

import random
from datetime import datetime, timedelta, timezone

from django.core.management.base import BaseCommand
from django.db import transaction

from shop.models import Customer, Order, OrderLine, Product

CUSTOMERS = 120
PRODUCTS = 240
ORDERS = 2000
# Order 1 is the benchmark's page: with the order and its customer this makes 51 queries.
BULK_ORDER_LINES = 48
FIRST_DAY = datetime(2024, 1, 1, 8, 0, tzinfo=timezone.utc)

ADJECTIVES = "amber brisk copper dusty early fine gentle hollow ivory jolly keen little mellow noble olive".split()
NOUNS = "kettle lamp mirror needle oven pillow quilt ruler saddle table umbrella vase wagon chair bucket".split()
CATEGORIES = "kitchen bedroom garden workshop travel office".split()
CITIES = "Basel Bergen Ghent Graz Lund Porto Riga Turin".split()
FIRST_NAMES = "Ada Bela Cleo Dora Emil Faye Gus Hana Ivo June Karl Lena".split()
LAST_NAMES = "Abel Brandt Costa Dahl Evers Falk Grau Holm Ilves Jansen".split()


class Command(BaseCommand):
    help = "Replaces everything in the shop by the same made-up rows"

    @transaction.atomic
    def handle(self, *args, **options):
        rng = random.Random(20240101)
        for model in (OrderLine, Order, Product, Customer):
            model.objects.all().delete()
        # Explicit keys: the pages' addresses stay the same after seeding twice, on every database.
        customers = Customer.objects.bulk_create(customer(rng, pk) for pk in range(1, CUSTOMERS + 1))
        products = Product.objects.bulk_create(product(rng, pk) for pk in range(1, PRODUCTS + 1))
        orders = Order.objects.bulk_create(order(rng, pk, customers) for pk in range(1, ORDERS + 1))
        lines = [line for row in orders for line in lines_of(rng, row, products)]
        for pk, line in enumerate(lines, start=1):
            line.pk = pk
        OrderLine.objects.bulk_create(lines, batch_size=200)
        if options["verbosity"]:
            counts = f"{len(customers)} customers, {len(products)} products"
            self.stdout.write(f"{counts}, {len(orders)} orders, {len(lines)} lines")


def customer(rng, pk):
    name = f"{rng.choice(FIRST_NAMES)} {rng.choice(LAST_NAMES)}"
    return Customer(pk=pk, name=name, email=f"customer{pk}@shop.example", city=rng.choice(CITIES))


def product(rng, pk):
    words = [f"{rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}" for _ in range(12)]
    return Product(
        pk=pk,
        sku=f"SKU-{pk:05d}",
        name=f"{rng.choice(ADJECTIVES)} {rng.choice(NOUNS)} {pk}".capitalize(),
        category=rng.choice(CATEGORIES),
        description=f"Goes well with a {', a '.join(words[:-1])} or a {words[-1]}.",
        price_cents=rng.randrange(199, 49_999),
        stock=rng.choice([0, 3, 8, 25, 60, 140]),
    )


def order(rng, pk, customers):
    placed = FIRST_DAY + timedelta(minutes=rng.randrange(0, 2 * 365 * 24 * 60))
    status = rng.choices(["paid", "shipped", "returned"], [3, 10, 1])[0]
    return Order(pk=pk, customer=rng.choice(customers), placed=placed, status=status)


def lines_of(rng, row, products):
    count = BULK_ORDER_LINES if row.pk == 1 else rng.randrange(1, 13)
    for chosen in rng.sample(products, count):
        yield OrderLine(
            order=row, product=chosen, quantity=rng.randrange(1, 6), unit_price_cents=chosen.price_cents
        )
