// A server of Go's standard library: server PORT
package main

import (
	"fmt"
	"io"
	"net/http"
	"os"
	"strings"
	"time"
)

func serve(w http.ResponseWriter, r *http.Request) {
	body, _ := io.ReadAll(r.Body)
	switch strings.Split(r.URL.Path, "/")[1] {
	case "burn":
		for end := time.Now().Add(2 * time.Millisecond); time.Now().Before(end); {
		}
	case "wait":
		time.Sleep(2 * time.Millisecond)
	case "stream":
		for n := 0; n < 5; n++ {
			fmt.Fprintf(w, "part %d\n", n)
			w.(http.Flusher).Flush()
		}
	}
	fmt.Fprintf(w, "%d bytes", len(body))
}

func main() {
	http.HandleFunc("/", serve)
	panic(http.ListenAndServe("127.0.0.1:"+os.Args[1], nil))
}
