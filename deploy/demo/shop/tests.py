"""What the demo and the benchmark rely on: `manage.py test`."""

from django.core.management import call_command
from django.test import SimpleTestCase, TestCase

from . import reports, searching


class Pages(TestCase):
    @classmethod
    def setUpTestData(cls):
        call_command("seed", verbosity=0)

    def test_the_benchmarks_page_makes_51_queries(self):
        with self.assertNumQueries(51):
            self.assertContains(self.client.get("/orders/1/"), "<tr>", count=48)

    def test_light_pages_stay_light(self):
        for address, queries in {"/healthz": 0, "/": 2, "/products/": 1, "/products/7/": 3}.items():
            with self.subTest(address), self.assertNumQueries(queries):
                self.assertEqual(self.client.get(address).status_code, 200)

    def test_unknown_rows_are_not_found(self):
        for address in ["/products/99999/", "/orders/99999/", "/nothing/"]:
            self.assertEqual(self.client.get(address).status_code, 404)

    def test_search_finds_whole_words_and_their_endings(self):
        answer = self.client.get("/search/", {"q": "lamp"}).json()
        self.assertEqual(answer["count"], 25)
        self.assertIn("lamp", answer["hits"][0]["name"].lower())

    def test_seeding_twice_gives_the_same_pages(self):
        before = self.client.get("/reports/sales/").content
        call_command("seed", verbosity=0)
        self.assertEqual(self.client.get("/reports/sales/").content, before)


class Statistics(SimpleTestCase):
    def test_percentile_is_the_nearest_rank(self):
        self.assertEqual(reports.percentile([15, 20, 35, 40, 50], 50), 35)
        self.assertEqual(reports.percentile([15, 20, 35, 40, 50], 95), 50)

    def test_gini_of_equal_and_of_one_sided_amounts(self):
        self.assertEqual(reports.gini([5, 5, 5, 5]), 0)
        self.assertEqual(reports.gini([0, 0, 0, 8]), 0.75)

    def test_trend_of_a_straight_line_is_its_slope(self):
        self.assertEqual(reports.trend([{"cents": 100}, {"cents": 130}, {"cents": 160}]), 30)

    def test_search_escapes_the_users_words(self):
        product = {"pk": 1, "name": "a+b", "category": "", "description": "(x"}
        self.assertEqual(searching.find("((( [a-", [product]), [])
